"""What a network is, and the flat list of ops that it is lowered to.

Reading order: `spec` (what a network is) -> `ops` (what each op reads, writes and computes) -> `plan` (a network as
a list of ops) -> `lowering` (how that list is written).
"""
