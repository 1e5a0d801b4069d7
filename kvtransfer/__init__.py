"""Arena registration, leases, ledger, fence, transports."""
