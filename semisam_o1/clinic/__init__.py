"""The way into and out of MONAI Label."""
