"""Plugins of kind `adapter_formats`."""
