"""What the press says of these schemes, judged by what the models here hold, allocate and compute."""
