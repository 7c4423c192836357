"""The engine: plain synchronous torch. It computes, and never knows that anyone watches."""
