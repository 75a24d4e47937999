"""What several folders of tests share: tiny models, training, stand-ins for a device, checks of kernels."""
