"""Beside the road: the rules of the platform that gateway and command line share.

In: a caller's tenant and a definition in the public shapes. Out: rows of the store, the same
shapes back, or an error of one of the four families. No HTTP is known here.
"""
