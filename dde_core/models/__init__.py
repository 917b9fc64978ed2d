"""Models as files and as modules: read a diffusers folder, say captions to it, train its U-Net, write what came of it."""
