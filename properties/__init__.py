"""What a correct attention with a KV cache obeys: cases, laws, and the runner that checks them."""
