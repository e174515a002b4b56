"""What every experiment stands on: data, devices, checkpoints, the training session and the DDPM mathematics."""
