"""Plugins of kind `stores`."""
