"""What a run says of itself: metrics, progress, throughput, and a picture at the end."""
