"""What the entry point of autoload costs at `import torch`."""
