"""What is done with an encoder's numbers: from texts to sequences for the network, and from its arrays to answers.

Plain Python and numpy over token ids: the server and `fastserve.pipeline` share it, and neither torch nor an engine is
imported. Each task makes a `Job`: pieces for the network, and what becomes of their arrays.
"""
