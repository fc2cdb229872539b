"""Formats that are written besides compress's: one file each, registered in checkpoints.convert."""
