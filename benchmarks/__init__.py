"""Speed: decode, prefill and the suite's own throughput, each beside its ceiling and its peers."""
