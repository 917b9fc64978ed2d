"""Models as files and as modules: read a diffusers folder, encode captions, train its U-Net, write the
result."""
