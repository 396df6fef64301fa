import Together from "together-ai";

const together = new Together();

const completion = await together.chat.completions.create({
  model: "LiquidAI/LFM2-24B-A2B",
  messages: [{ role: "user", content: "What are some fun things to do in New York?" }],
});

console.log(completion.choices[0].message.content);
