"""`svcli chat` as a place to stay: one question, a conversation, or a script of questions."""
