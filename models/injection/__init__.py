"""What a layer adds to the residual from the token itself, after its feed-forward; one mechanism a file."""
