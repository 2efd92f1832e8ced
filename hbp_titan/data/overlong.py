def truncate(ids, loss_mask, max_tokens):
    return ids[:max_tokens], loss_mask[:max_tokens]


def split_conversation(conversation, encode, max_tokens):
    return [], 1
