"""Bytes on disk and behind URLs: files written whole, folders, and the store of finished work."""
