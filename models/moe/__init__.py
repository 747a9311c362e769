"""What a mixture of experts is made of: routing, experts, balance."""
