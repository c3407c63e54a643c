"""Parts that both clients share: requests, the meaning of answers, and retries. Nothing here waits."""
