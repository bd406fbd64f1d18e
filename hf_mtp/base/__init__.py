"""What has to be known of a base model, found out from the model itself."""
