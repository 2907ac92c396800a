"""Between worker, egress and recorder: frozen messages over a socketpair, with descriptors.

In and out: messages of `ringfence.channel.messages`, one JSON object a frame (4-byte big-endian
length, at most 16 MiB). The channel is an inherited socketpair, so that its peer is known by
construction; nothing inside a sandbox can reach it.
"""
