"""The direct way between two workers: a session of their own, beside the one each has with the hub.

Its first lane is a stream through the hub, which tells each side who the other is. Over it both say
the keys by which the lanes that follow are known: those go by SSH, from one worker to the other.
While one of these is well, the lane through the hub is in reserve.
"""
