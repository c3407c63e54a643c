import { describe, expect, it } from 'vitest'
import { inWords, key, largest, pictureOf, together, valueOf, type Report } from './layers'

const module = (name: string, norm: number, relative_norm: number | null, rank = 8): Report['modules'][number] => ({
  name, norm, relative_norm, rank, kind: 'lora', alpha: 16, parameters: 1, spectral_norm: null,
})

describe('the picture of a version', () => {
  const report = {
    base_layers: 4,
    base_linears: ['self_attn.q_proj', 'mlp.up_proj'],
    modules: [module('model.layers.0.self_attn.q_proj', 1, 0.01), module('model.layers.3.self_attn.q_proj', 3, 0.05), module('lm_head', 2, 0.02, 0)],
  }

  it('has the base’s layers and modules, also those that are left alone', () => {
    const picture = pictureOf(report)
    expect([picture.layers, picture.rows]).toEqual([4, ['self_attn.q_proj', 'mlp.up_proj']])
    expect(picture.places.get(key('self_attn.q_proj', 3))).toEqual({ norm: 3, relative: 0.05, rank: 8 })
    expect(valueOf(picture.places.get(key('mlp.up_proj', 0)), 'norm')).toBe(0)
    expect([...picture.outside.keys()]).toEqual(['lm_head'])
    expect(largest(picture, 'relative')).toBe(0.05)
  })

  it('says in words where most is', () => {
    expect(inWords(pictureOf(report), 'relative')).toBe('It acts in 2 of 4 layers, on 1 of 2 modules of a layer; most on self_attn.q_proj of layer 3 (5% of the base’s weight).')
    expect(inWords(pictureOf({ modules: [] }), 'norm')).toBe('It changes nothing.')
    expect(inWords(pictureOf({ modules: [module('lm_head', 1, null)] }), 'norm')).toBe('It changes no layer.')
  })

  it('takes the experts of a layer as one', () => {
    const { places, rows } = pictureOf({ modules: [module('m.layers.1.mlp.experts.0.up', 3, 0.1), module('m.layers.1.mlp.experts.1.up', 4, 0.1)] })
    expect(rows).toEqual(['mlp.experts.up'])
    expect(places.get(key('mlp.experts.up', 1))).toEqual({ norm: 5, relative: expect.closeTo(0.1) as number, rank: 8 })
  })

  it('says where a figure is not known', () => {
    const { places } = pictureOf({ modules: [module('m.layers.1.q', 3, null)] })
    expect(valueOf(places.get(key('q', 1)), 'relative')).toBeNull()
  })

  it('stands on the same layers as another one', () => {
    const [one, other] = together(pictureOf(report), pictureOf({ modules: [module('m.layers.7.k', 1, 1)] }))
    expect([one.layers, one.rows]).toEqual([other.layers, other.rows])
    expect(one.layers).toBe(8)
  })
})
