"""Plugins of kind `executors`."""
