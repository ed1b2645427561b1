"""`svcli bench`: what each stage of an answer takes, dense against skipped. Imports no torch by itself."""
