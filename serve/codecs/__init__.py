"""Pixels to bytes and back: pictures, H.264, fragmented MP4."""
