No model, but a note. MONAI Label takes a bundle without models/model.pt or models/model.ts for none, and then says
nothing of use when a person asks for a label. With this file it reads the bundle, which says what to do: train first.
