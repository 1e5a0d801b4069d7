"""HTTP and gRPC front, validation, tokenizing, placement, dispatch, admin. No torch."""
