"""What every op needs: Triton or torch, launches, specialisations for ahead-of-time compilation, threads."""
