"""What is known of model architectures, and what a loaded model says of itself."""
