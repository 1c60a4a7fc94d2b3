"""Plugins of kind `checkpoint_formats`."""
