"""What `kantor bench` compares: a module a case, each with `TITLE`, `PEERS`, `problems`, `make` and `judge`."""
