"""Images: the root file system that an agent sees, made on this host without a registry.

In: a definition (packages by name, nothing else) and the claude binary. Out: a directory tree
known by the digest of everything in it, and the forms that backends and other engines take:
tar, docker and OCI archives, ext4, squashfs. A backend needs `image.Image` and `store.require`.
"""
