"""What a training run is made of: its settings, its start, its objective, its workdir, what is looked at on the way."""
