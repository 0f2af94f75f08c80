"""What skipping costs in quality, measured on real models."""
