"""Plugins of kind `exporters`."""
