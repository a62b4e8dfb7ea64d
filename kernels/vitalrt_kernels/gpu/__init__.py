"""The Triton kernels and their launchers, one file per operation.

Importing a module of this package imports triton; nothing outside of it does. That keeps a machine without triton
whole, keeps triton out of start-up on the CPU, and lets tests decide how kernels run (compiled, or TRITON_INTERPRET=1)
before the first is defined. Launchers trust their arguments: the public function of the same name has checked them.

BLOCKS_PER_SM in each file is the occupancy that a kernel is written for: how many of its thread blocks must fit on one
multiprocessor at production shapes, by registers, shared memory and threads; of some by ROWS. The ahead-of-time test
holds it.
"""
