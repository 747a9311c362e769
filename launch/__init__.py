"""Many runs: started, compared, and what a machine makes of them."""
