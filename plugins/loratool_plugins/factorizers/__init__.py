"""Plugins of kind `factorizers`."""
