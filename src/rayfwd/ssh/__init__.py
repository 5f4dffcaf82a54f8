"""The way to the head by SSH, what is wrong where there is none, and a lane's bytes on it."""
