"""What runs in compose.yaml beside the service."""
