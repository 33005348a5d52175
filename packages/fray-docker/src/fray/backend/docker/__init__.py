"""Jobs as containers, and the images that they run in."""
