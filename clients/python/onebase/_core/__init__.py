"""What both clients share: what is sent, what an answer means, when to try again. Nothing here waits."""
