"""Solutions of notebook 02."""

# 02.1
answer = 10


# 02.2
async def answer(handles):
    import asyncio

    results = await asyncio.gather(*handles, return_exceptions=True)
    return sum(isinstance(result, Exception) for result in results)
