"""The values of row gradients in host memory: their sums, their memory, what is known of them."""
