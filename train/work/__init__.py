"""What the modules of train/ start once their flags are read: models, data and reports of each task. The only part that loads torch."""
