//! The tensors of a model: names, shapes and initial distributions.
use std::collections::BTreeMap;

/// How a tensor is initialised if no weights are given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Constant(f32),
    /// Normal around zero, by standard deviation.
    Normal(f64),
    /// Uniform in -x ..= x.
    Uniform(f64),
}

impl Init {
    /// Makes a normal distribution with variance 1 / inputs (LeCun).
    pub fn lecun(inputs: usize) -> Self {
        Self::Normal((inputs as f64).powf(-0.5))
    }

    /// Makes a uniform one with variance 2 / (inputs + outputs) (Glorot and Bengio 2010, equation
    /// 16).
    pub fn xavier(inputs: usize, outputs: usize) -> Self {
        Self::Uniform((6.0 / (inputs + outputs) as f64).sqrt())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub shape: Vec<usize>,
    pub init: Init,
    /// Whether weights may leave it out. An optional tensor is never initialised.
    pub optional: bool,
}

/// All tensors of a model by name, in order of name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters(BTreeMap<String, Parameter>);

impl Parameters {
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.0.insert(
            name.into(),
            Parameter {
                shape: shape.to_vec(),
                init,
                optional: false,
            },
        );
    }

    /// Adds a tensor that weights may leave out.
    pub fn add_optional(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.insert(
            name.into(),
            Parameter {
                shape: shape.to_vec(),
                init: Init::Constant(0.0),
                optional: true,
            },
        );
    }

    /// Adds `{at}.weight` `[outputs, inputs]` and a zero `{at}.bias`.
    pub fn linear(&mut self, at: &str, inputs: usize, outputs: usize, init: Init) {
        self.add(format!("{at}.weight"), &[outputs, inputs], init);
        self.add(format!("{at}.bias"), &[outputs], Init::Constant(0.0));
    }

    pub fn layer_norm(&mut self, at: &str, size: usize) {
        self.add(format!("{at}.weight"), &[size], Init::Constant(1.0));
        self.add(format!("{at}.bias"), &[size], Init::Constant(0.0));
    }

    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.0.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.0
            .iter()
            .map(|(name, parameter)| (name.as_str(), parameter))
    }
}
