"""Names of diffusion models: diffusers' folders, single files, and the adapters of both.

Everything here is a pure function of names and shapes. A *canonical* name is diffusers' name of a
parameter with its component in front ("unet.conv_in.weight"), whatever a checkpoint calls it.
"""
