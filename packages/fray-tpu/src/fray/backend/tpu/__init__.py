"""Cloud TPU slices, asked for in one line and never left running: the provisioner named `gcp-tpu`."""
